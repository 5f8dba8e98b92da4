"""Separates the experts that a script brings (`deepspeed.moe`); there are none of our own."""
