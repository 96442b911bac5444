"""Tests of the package that every party stands on."""
