"""Examines one backend on its own hardware: conformance, alignment and utilisation, in one file to
send back."""
