"""Checks of a machine and a job before anything is launched."""
