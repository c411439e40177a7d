"""Small data sets and networks that reproductions and tests share."""
