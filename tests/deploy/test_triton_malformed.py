"""Wrong requests on the real server: each is refused in a few words that tell nothing of the server, which goes on."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc as transport
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.grpc import service_pb2, service_pb2_grpc

from hidiff_runtime import Pipeline
from hidiff_runtime.serving.public_errors import LONGEST
from tests.deploy import malformed
from tests.deploy.clients import MODEL, STREAM, inputs, picture, same
from tests.deploy.clients import http as client_of
from tests.deploy.malformed import PROMPT, Http, Tensor
from tests.deploy.server import TritonServer

pytestmark = pytest.mark.needs("tritonserver")

Answer = tuple[bool, str]
"""Whether the request was refused, and what was said."""

_TRITONS = 1000
"""Characters that Triton itself may take; its hint on shapes is longer than our longest message."""

_TELLING = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|/(?:bin|dev|etc|home|opt|proc|root|srv|tmp|usr|var|work)/|0x[0-9a-f]{6,}"
    r"|\b[A-Z]\w+(?:Error|Exception)\b"
)


def complaint(answer: Answer, longest: int) -> str:
    """What is wrong with the answer to a wrong request; empty where it is as it should be."""
    refused, text = answer
    if not refused:
        return "it was not refused"
    if not text.strip():
        return "nothing was said"
    if len(text) > longest:
        return f"{len(text)} characters: {text[:80]}…"
    return f"tells too much: {text}" if _TELLING.search(text) else ""


def complaints(answers: Mapping[str, Answer], longest: int = _TRITONS) -> dict[str, str]:
    """Of many answers, those with a complaint."""
    return {name: said for name, answer in answers.items() if (said := complaint(answer, longest))}


@pytest.fixture(scope="module", autouse=True)
def goes_on(served: TritonServer, sd15_bundle: Path) -> Iterator[None]:
    """After all that, the server draws the picture of the pipeline, with the processes that it began with."""
    before = [served.stubs(model) for model in (MODEL, STREAM)]
    yield
    with client_of(served) as client, Pipeline.open(sd15_bundle) as pipe:
        answer = client.infer(MODEL, inputs(tritonclient.http, prompt=PROMPT, seed=3))
        assert same(picture(answer.as_numpy("image")[0, 0]), pipe(PROMPT, seed=3))
        assert not same(picture(answer.as_numpy("image")[0, 0]), pipe(PROMPT, seed=4))
    assert [served.stubs(model) for model in (MODEL, STREAM)] == before
    assert served.process.poll() is None


@pytest.fixture(scope="module")
def service(served: TritonServer) -> Iterator[Any]:
    """Triton's gRPC service, below the client library, which would refuse some requests itself."""
    with transport.insecure_channel(served.grpc, options=[("grpc.max_send_message_length", -1)]) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensors_of(values: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Right tensors of values, with a good prompt where there is none."""
    made = inputs(tritonclient.grpc, **({"prompt": PROMPT} | dict(values)))
    return tuple(Tensor(one.name(), one.datatype(), tuple(one.shape()), one._get_content()) for one in made)


def over_http(server: TritonServer, request: Http) -> Answer:
    """Sends a whole HTTP request."""
    with closing(http.client.HTTPConnection(server.http, timeout=60)) as connection:
        connection.request(request.method, f"/v2/models/{request.path}", request.body, request.headers)
        answer = connection.getresponse()
        content = answer.read().decode("utf-8", errors="replace").removeprefix("data: ")
    try:
        return answer.status >= 400, json.loads(content)["error"]
    except (ValueError, KeyError):
        return answer.status >= 400, content


def by_http(server: TritonServer, tensors: tuple[Tensor, ...]) -> Answer:
    """Sends tensors as the client library does: a head in JSON, and their bytes behind it."""
    described = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
            "parameters": {"binary_data_size": len(tensor.raw)},
        }
        for tensor in tensors
    ]
    head = json.dumps({"inputs": described}).encode()
    body = b"".join((head, *(tensor.raw for tensor in tensors)))
    return over_http(server, Http(f"{MODEL}/infer", body, {"Inference-Header-Content-Length": str(len(head))}))


def message(tensors: tuple[Tensor, ...], model: str = MODEL) -> Any:
    """A request of gRPC."""
    made = service_pb2.ModelInferRequest(model_name=model)
    for tensor in tensors:
        made.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        made.raw_input_contents.append(tensor.raw)
    return made


def by_grpc(ask: Callable[..., Any], request: Any) -> Answer:
    """Asks the front."""
    try:
        ask(request, timeout=60)
    except transport.RpcError as error:
        return True, error.details() or error.code().name
    return False, ""


def by_stream(service: Any, request: Any) -> Answer:
    """Asks on a stream; what was sent before an error counts as not refused."""
    try:
        answers = [answer.error_message for answer in service.ModelStreamInfer(iter([request]), timeout=60)]
    except transport.RpcError as error:
        return True, error.details()
    return len(answers) == 1 and bool(answers[0]), "".join(answers)


def test_the_checker_sees_what_must_not_be_told() -> None:
    good = True, "The prompt is missing. Say what the picture is to show."
    planted = {
        "accepted": (False, good[1]),
        "silent": (True, " "),
        "long": (True, "a" * (LONGEST + 1)),
        "traceback": (True, "Traceback (most recent call last):"),
        "frame": (True, 'File "model", line 3, in execute'),
        "module": (True, "in stream.py"),
        "path": (True, "There is no file /tmp/models/hidiff/1/bundle/manifest.json."),
        "class": (True, "KeyError: 'prompt'"),
        "address": (True, "<object at 0x7f00aa55>"),
    }
    assert set(complaints(planted, LONGEST)) == set(planted)
    assert complaints({"good": good}, LONGEST) == {}


def test_there_are_at_least_a_hundred_kinds() -> None:
    tables = (malformed.values(), malformed.tensors(), malformed.generations(), malformed.requests(), malformed.sent())
    assert sum(len(table) for table in tables) >= 240


def test_wrong_values_are_refused_by_each_way_of_asking(served: TritonServer, service: Any) -> None:
    tensors = {name: tensors_of(values) for name, values in malformed.values().items()}
    by_front = {name: by_grpc(service.ModelInfer, message(made)) for name, made in tensors.items()}
    assert complaints(by_front, LONGEST) == {}
    assert {name: by_http(served, made) for name, made in tensors.items()} == by_front
    assert {name: by_stream(service, message(made, STREAM)) for name, made in tensors.items()} == by_front


def test_wrong_tensors_are_refused_by_each_way_of_asking(served: TritonServer, service: Any) -> None:
    tensors = malformed.tensors()
    assert complaints({name: by_http(served, made) for name, made in tensors.items()}) == {}
    assert complaints({name: by_grpc(service.ModelInfer, message(made)) for name, made in tensors.items()}) == {}
    assert complaints({name: by_stream(service, message(made, STREAM)) for name, made in tensors.items()}) == {}


def test_wrong_generations_are_refused(served: TritonServer) -> None:
    for path in (f"{MODEL}/generate", f"{STREAM}/generate_stream"):
        answers = {name: over_http(served, Http(path, body)) for name, body in malformed.generations().items()}
        assert complaints(answers) == {}, path


def test_wrong_values_in_generations_are_refused(served: TritonServer) -> None:
    """Those that JSON has."""
    texts = {
        name: json.dumps({"prompt": PROMPT} | values)
        for name, values in malformed.values().items()
        if not any(isinstance(value, bytes) for value in values.values())
    }
    answers = {name: over_http(served, Http(f"{MODEL}/generate", body.encode())) for name, body in texts.items()}
    assert len(answers) >= 50
    assert complaints(answers) == {}


def test_wrong_requests_are_refused(served: TritonServer) -> None:
    answers = {name: over_http(served, request) for name, request in malformed.requests().items()}
    long_name = answers.pop("a model whose name is long")  # Triton gives it back
    assert complaints(answers) == {}
    assert long_name[0]


def test_wrong_messages_are_refused(served: TritonServer, service: Any) -> None:
    """What only gRPC has: contents beside raw contents, parameters of wrong types, and bytes that are no message."""
    good = tensors_of({})
    odd = {name: message(good) for name in ("both", "fewer", "soon", "version", "name", "output")}
    odd["both"].inputs[0].contents.bytes_contents.append(b"a")
    del odd["fewer"].raw_input_contents[:]
    odd["soon"].parameters["timeout"].string_param = "soon"
    odd["version"].model_version = "latest"
    odd["name"].model_name = "../hidiff"
    odd["output"].outputs.add(name="depth")
    answers = {name: by_grpc(service.ModelInfer, request) for name, request in odd.items()}
    answers |= {f"{name} on a stream": by_stream(service, request) for name, request in odd.items()}
    with transport.insecure_channel(served.grpc) as channel:
        for name, method in (("noise", "ModelInfer"), ("unknown method", "Draw")):
            ask = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
            answers[name] = by_grpc(ask, b"\xff\xfe noise")
    assert complaints(answers) == {}


def test_broken_connections_do_no_harm(served: TritonServer) -> None:
    host, port = served.http.split(":")
    for content in malformed.sent().values():
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            try:
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
                told = connection.recv(65536).decode(errors="replace")
            except OSError:  # the server has hung up
                continue
        assert " 200 " not in told.split("\n", 1)[0]
        assert not _TELLING.search(told)
    assert served.ready()


@pytest.mark.parametrize("token", ["../../../../tmp/token", "a" * 32, 7, True, ""])
def test_the_front_s_own_parameter_is_of_no_use_to_a_client(served: TritonServer, token: object) -> None:
    body = json.dumps({"prompt": PROMPT, "output": "base64", "hidiff_token": token}).encode()
    refused, text = over_http(served, Http(f"{STREAM}/generate_stream", body))
    assert not refused
    assert '"event":"result"' in text
