"""The measures of the field on arrays: no models, no files."""
