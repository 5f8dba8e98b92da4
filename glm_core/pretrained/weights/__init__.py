"""Weights of every checkpoint layout: read, converted and written by one table of layouts."""
