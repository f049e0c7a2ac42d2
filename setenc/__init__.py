"""Set encoders that stream."""

__all__: list[str] = []
