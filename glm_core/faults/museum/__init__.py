"""Holds the museum: mistakes that public reports describe, planted in our own terms."""
