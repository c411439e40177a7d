"""Property tests draw the same examples everywhere, and no machine is too slow for them."""

from hypothesis import settings

from stores import hub, other_s3, s3, s3_environment, s3_server, store  # noqa: F401  (fixtures)

settings.register_profile("salience", deadline=None, derandomize=True)
settings.load_profile("salience")
