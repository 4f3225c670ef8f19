"""What ``fuzzhttp.py`` asks in TensorFlow Serving's protocol: something between a valid request and none."""

from __future__ import annotations

from random import Random
from typing import Any, Final

import orjson

_PATHS: Final = (b"", b"", b"", b"/versions/1", b"/versions/9", b"/labels/canary", b"/labels/odd", b"/labels/%00")
_ENDS: Final = (b":predict", b":predict", b":predict", b":classify", b":regress", b"", b":guess", b"/metadata", b":")


def request(random: Random, text: bool, model: int, odd: Any) -> tuple[bytes, bytes]:
    """Target and body. ``text``: the model takes strings. ``odd``: what may stand anywhere in it."""
    target = b"/v1/models/m%d%b%b" % (model, random.choice(_PATHS), random.choice(_ENDS))
    value: Any = random.choice(("x", {"b64": "YQ=="}, {"b64": "*"})) if text else random.choice((0, 1))
    row: Any = [value, value]
    if random.random() < 0.2:
        row[random.randrange(2)] = odd
    rows: Any = [row] * random.choice((1, 1, 2, 65, 700))
    named = [{"x": each} for each in rows]
    if random.random() < 0.2:
        random.choice((rows, named))[random.randrange(len(rows))] = random.choice((odd, {"x": odd}, {}))
    asked: dict[str, Any] = random.choice(
        (
            {"instances": rows},
            {"instances": named},
            {"inputs": rows},
            {"inputs": {"x": rows}},
            {"examples": named, "context": {"x": row}},
            {"examples": [{}, *named[:3]], "context": {"x": odd}},
        )
    )
    if random.random() < 0.2:
        asked[random.choice(("instances", "inputs", "examples", "context", "signature_name"))] = odd
    try:
        return target, orjson.dumps(asked)
    except (TypeError, orjson.JSONEncodeError):
        return target, b"{"
