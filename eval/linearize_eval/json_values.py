"""Floats that JSON cannot hold."""

import math


def finite(value):
    """`value`, of dicts, lists and plain values, with every infinite or NaN float replaced by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
