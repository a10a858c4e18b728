"""The description of the REST interface: valid, and true of the answers to what it allows and to what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

from tests.kit.applications import App, price, publish
from tests.kit.brokers import running

from .test_app_rest import FUNCTIONS, found

EXAMPLES = 15


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    directory = tmp_path_factory.mktemp("openapi")
    with running(directory / "data") as broker:
        broker.create("prices", partitions=2)
        publish(broker, *[price(f"c{number}", number) for number in range(20)], ("bad", b"{"))
        made = App(broker, directory / "application", FUNCTIONS)
        made.more = {"copy": "on"}
        with made.running():
            made.until("SELECT count(*) FROM prices", [(20,)])
            yield made


@pytest.fixture(scope="module")
def document(app: App) -> Any:
    return found(app, "/openapi.json")


def test_it_is_valid(document: Any) -> None:
    validate(document, cls=OpenAPIV31SpecValidator)
    assert {"/v1/latest/prices/{key}", "/v1/latest/prices", "/v1/changes/prices", "/price/{code}"} <= {
        *document["paths"]
    }
    assert document["components"]["schemas"]["prices_record"]["properties"]["value"] == {
        "$ref": "#/components/schemas/Price"
    }
    answer = document["paths"]["/price/{code}"]["get"]
    assert answer["summary"] == "A price, in cents."
    assert [(one["name"], one["required"]) for one in answer["parameters"]] == [("code", True), ("currency", False)]


# Streams that do not end, functions that wait for a test, and what is no JSON.
LEFT_OUT = ("/v1/changes/prices", "/slow", "/wait", "/text")


def can_be_wrong(operation: Any) -> bool:
    """Is there anything but text?"""
    return "requestBody" in operation or any(one["schema"] != {"type": "string"} for one in operation["parameters"])


def test_answers_are_as_it_says(app: App, document: Any) -> None:
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url="http://{}:{}".format(*app.service.http_address))
    tried = 0
    for one in schema.get_all_operations():
        operation = one.ok()
        if operation.path in LEFT_OUT:
            continue
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            if mode is schemathesis.GenerationMode.NEGATIVE and not can_be_wrong(operation.definition.raw):
                continue

            @settings(
                max_examples=EXAMPLES,
                database=None,
                derandomize=True,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                response = case.call()
                assert response.status_code < 500 or response.status_code == 503, response.text
                case.validate_response(
                    response,
                    checks=[
                        schemathesis.checks.not_a_server_error,
                        schemathesis.specs.openapi.checks.response_schema_conformance,
                        schemathesis.specs.openapi.checks.content_type_conformance,
                    ],
                )

            ask()
            tried += 1
    assert tried > 15
