"""One Hypothesis profile for every test: seeded by the test itself, and without a clock, for machines that are busy."""

from hypothesis import HealthCheck, settings

settings.register_profile("foreplan", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("foreplan")
