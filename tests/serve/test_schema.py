"""Whatever fits the server's own description of itself, or nearly fits it, is answered or refused: never a 5xx."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import registry
from foveate.core import Method
from foveate.errors import FoveateError
from foveate.serve.app import CHAT
from foveate.serve.limits import Limits
from foveate.serve.reader import Reader
from foveate.serve.refusals import Refused
from tests.serve.conftest import serving

schemathesis = pytest.importorskip("schemathesis")


def test_requests_made_from_the_schema(model: tuple[Any, Any]) -> None:
    with serving(Reader("demo", *model, registry.from_spec("adav:keep=64")), Limits()) as port:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
        operation, modes = schema[CHAT]["POST"], schemathesis.GenerationMode
        statuses = set()

        @given(case=st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes)))
        @settings(max_examples=30, database=None)
        def fuzz(case: Any) -> None:
            response = case.call()
            statuses.add(response.status_code)
            assert response.status_code < 500, response.text

        fuzz()
        assert {200, 400} <= statuses


@given(
    spec=st.one_of(
        st.text(max_size=40),
        st.builds(
            "{}:{}={}".format,
            st.sampled_from(registry.names()),
            st.sampled_from(["keep", "per", "positions", "stages", "exit", "share"]),
            st.one_of(st.text("0123456789.@/-+e_naif", max_size=8), st.text(max_size=8)),
        ),
    )
)
@settings(max_examples=150)
def test_specs_of_any_kind_are_built_or_refused(spec: str) -> None:
    """The model is not looked at before a question's turn has come."""
    reader = Reader.__new__(Reader)
    try:
        assert isinstance(reader.choose(None, spec), Method)
    except FoveateError as error:
        assert Refused.of(error).status == 400
