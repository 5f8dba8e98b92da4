"""Helps with mixtures of experts that a script brings (`deepspeed.moe`); there are no experts here."""
