"""``workerpools.httpx2``: the adapter for httpx on httpx2, beside the other one.

Here is what differs, and the contract. ``nox -s httpx2`` runs all tests of httpx on httpx2.
"""

from __future__ import annotations

import ast
import inspect
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

import workerpools
import workerpools.httpx
from tests.support.paths import environment
from tests.support.tls import TlsProxy
from tests.support.upstream import EchoUpstream
from workerpools import FailureKind, PooledTask, WorkerPools
from workerpools.testing import AdapterContract, TcpProxy, run_attempt

httpx2: Any = pytest.importorskip("httpx2", reason="httpx2 needs Python 3.11")
if httpx2 is httpx:
    pytest.skip("httpx stands for httpx2 here: this is about both", allow_module_level=True)

from workerpools.httpx2 import HttpxClient  # noqa: E402


class TestHttpxClient(AdapterContract):
    """As for httpx."""

    answer_to = b"POST"
    secret = "pass-of-the-api"

    @pytest.fixture
    def server(self, echo: EchoUpstream) -> tuple[str, int]:
        self.echo = echo
        return echo.host, echo.port

    def adapter(self, host: str, port: int) -> HttpxClient:
        return HttpxClient(base_url=f"http://shop:{self.secret}@{host}:{port}", trust_env=False)

    def read(self, value: Any) -> object:
        return value.get("/echo/token")

    def write(self, value: Any) -> object:
        return value.post("/orders")

    def written(self) -> int:
        return self.echo.orders

    def hold(self, value: Any) -> object:
        return value.send(value.build_request("GET", "/echo/token"), stream=True)


@pytest.mark.parametrize(("name", "core", "other"), [("httpx", "httpcore", "httpx2"), ("httpx2", "httpcore2", "httpx")])
def test_each_imports_its_own_library(name: str, core: str, other: str) -> None:
    """The other one need not be installed."""
    code = (
        f"import sys; sys.modules['{other}'] = None\n"
        f"import workerpools.{name} as adapter, workerpools\n"
        "adapter.HttpxClient().prepare()\n"
        f"print(adapter.HttpxClient.__module__, workerpools.{name} is adapter)\n"
        "print(*{m.partition('.')[0] for m in sys.modules} & {'httpcore', 'httpcore2'})\n"
        "print(*{m for m in sys.modules if m in ('workerpools.httpx', 'workerpools.httpx2')})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [f"workerpools.{name}", "True", core, f"workerpools.{name}"], done.stderr


def test_both_in_one_process(echo: EchoUpstream) -> None:
    """Two clients, each of its own library, with exceptions of its own; an error is classified by its own adapter."""
    with WorkerPools() as pools, TcpProxy(echo.host, echo.port) as proxy:
        url = f"http://{proxy.host}:{proxy.port}"
        clients = {
            httpx: pools.add(workerpools.httpx.HttpxClient(base_url=url), name="httpx"),
            httpx2: pools.add(HttpxClient(base_url=url), name="httpx2"),
        }
        for library, resource in clients.items():
            assert isinstance(resource.get(), library.Client)
            assert type(resource.get().get("/echo/1")) is library.Response
            mocked = library.Client(
                transport=library.MockTransport(lambda request, library=library: library.Response(201))
            )
            with resource.override(mocked):
                assert resource.get().get("http://x/").status_code == 201
        for library, resource in clients.items():
            proxy.lose_answer(b"POST")
            with pytest.raises(library.TransportError) as caught:
                run_attempt(lambda resource=resource: resource.get().post("/orders"))
            assert "it may have been done, and the task is not declared idempotent" in "".join(caught.value.__notes__)
            failure = workerpools.classify(caught.value)
            assert failure is not None
            assert (failure.kind, failure.resource) == (FailureKind.INDETERMINATE, library.__name__)
        proxy.cut()
        for resource in clients.values():
            # A GET on a connection that died is sent again.
            assert run_attempt(lambda resource=resource: resource.get().get("/echo/2").text) == "2"


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_unwatched_errors(library: str) -> None:
    """``workerpools.classify`` finds the adapter by the exception's package."""
    error = sys.modules[library].ConnectError("refused")
    failure = workerpools.classify(error)
    assert failure is not None
    assert failure.kind is FailureKind.UNAVAILABLE


def test_http2() -> None:
    """The option is there, and the transport is httpx2's."""
    pytest.importorskip("h2")
    with WorkerPools() as pools:
        client = pools.add(HttpxClient(http2=True), name="api").get()
        assert client._transport._current.transport._pool._http2


@pytest.mark.parametrize("verify", ["system", "given"])
def test_without_the_systems_certificates(tls_echo: TlsProxy, monkeypatch: pytest.MonkeyPatch, verify: str) -> None:
    """As in a slim image: no server is trusted, the error says so, and nothing is tried again. ``verify=`` helps."""
    import httpcore2._ssl

    nothing = ssl.DefaultVerifyPaths(None, None, "", "/nowhere/cert.pem", "", "/nowhere/certs")
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nothing)
    monkeypatch.setattr(httpcore2._ssl, "CA_FILE_CANDIDATES", [])
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    given = {} if verify == "system" else {"verify": tls_echo.client_context()}
    with WorkerPools() as pools:
        resource = pools.add(HttpxClient(base_url=f"https://localhost:{tls_echo.port}", **given), name="api")

        def body() -> str:
            return str(resource.get().get("/echo/1").text)

        if given:
            assert run_attempt(body) == "1"
            return
        with pytest.raises(httpx2.ConnectError, match="unable to get local issuer certificate") as caught:
            run_attempt(body, idempotent=True)
        failure = workerpools.classify(caught.value)
        assert failure is not None
        assert failure.kind is FailureKind.PERMANENT


def test_injection_and_settings(echo: EchoUpstream) -> None:
    """What serves httpx serves httpx2."""
    from celery import Celery

    from workerpools.bases import from_settings

    app = Celery("httpx2", set_as_current=False)
    app.conf.workerpools_http_base_url = f"http://{echo.host}:{echo.port}"

    class ApiTask(PooledTask):
        http = from_settings(HttpxClient)

    @app.task(base=ApiTask, name="httpx2.body")
    def body(http: Any = ApiTask.http.inject()) -> tuple[bool, str]:
        return isinstance(http, httpx2.Client), http.get("/echo/1").text

    assert body() == (True, "1")
    WorkerPools.of(app).close()


def test_the_stub_says_what_there_is() -> None:
    """Names and parameters, with their defaults and annotations."""
    stub = ast.parse(Path(workerpools.__file__).with_name("httpx2.pyi").read_text())
    source = ast.parse(Path(workerpools.httpx.__file__).read_text())

    def declared(tree: ast.Module) -> Any:
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        functions = {
            f"{name}.{node.name}": node
            for name in ("_Declared", "HttpxClient", "AsyncHttpxClient")
            for node in classes[name].body
            if isinstance(node, ast.FunctionDef)
        }
        top = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        made = {**functions, "default_limits": top["default_limits"], "classify()": top["classify"]}
        return {
            name: [
                (argument.arg, ast.unparse(argument.annotation or ast.Constant(None)).replace("httpx2", "httpx"))
                for argument in (*node.args.args, *node.args.kwonlyargs)
            ]
            for name, node in made.items()
        }

    here, there = declared(stub), declared(source)
    assert {name: there[name] for name in here} == here
    parameters = inspect.signature(HttpxClient).parameters
    init = next(node for node in ast.walk(stub) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
        if argument.arg != "timeout":
            assert default is not None
            assert parameters[argument.arg].default == ast.literal_eval(default), argument.arg
