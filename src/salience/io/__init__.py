"""The one reader and the one writer of corpora and tables."""
