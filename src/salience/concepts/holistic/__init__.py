"""Extraction of concepts and their importance, measured; the strategies behind a class."""
