"""Stages with gates as one run that can be stopped anywhere and goes on."""
