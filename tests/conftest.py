"""Settings of all tests: none may fail because the machine is busy."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "any speed", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip
settings.load_profile("any speed")
