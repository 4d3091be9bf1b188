"""Serve a model over HTTP, in the form of OpenAI's API, with a chat page.

hsai serve bundles/int4
hsai serve SmolLM2-135M-Instruct.Q4_1.gguf --port 8080 --context 2048
HSAI_API_KEY=... hsai serve bundles/int4 --host 0.0.0.0
The paths are /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics, and the page at /.

Without an API key only programs of this machine are served. SIGTERM and Ctrl-C let running requests end first.
docs/serving.md tells more.
"""

import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import get_args

from hsai.allocator import share_heaps
from hsai.cli.answers import add_activations_argument, trace_engine
from hsai.cli.drafting import add_drafting_arguments, check_drafting_arguments
from hsai.cli.parser import Parser
from hsai.errors import InputError
from hsai.infer.defaults import read_defaults
from hsai.infer.service import Service
from hsai.models import CacheFormat
from hsai.progress import say

HOST = "127.0.0.1"
KEY_VARIABLE = "HSAI_API_KEY"
SHORTEST_KEY = 8


def add_arguments(parser: Parser) -> None:
    """Those of the command."""
    parser.add_argument("model", type=Path, help="a run, a bundle, a checkpoint of transformers, or a GGUF file")
    parser.add_argument("--host", default=HOST, help=f"address (default: {HOST}); any other one needs an API key")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free (default: 8000)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"what requests must bring (default: ${KEY_VARIABLE}, which other users of the machine do not see)",
    )
    parser.add_argument("--name", help="of the model in requests (default: that of its file or directory)")
    parser.add_argument(
        "--context", type=int, help="tokens of a prompt and its answer at most (default: the model's longest)"
    )
    parser.add_argument(
        "--cache",
        choices=get_args(CacheFormat),
        help="how keys and values are stored: in the activations' dtype (default), in bfloat16, int8, or int4",
    )
    add_activations_argument(parser)
    add_drafting_arguments(parser)
    parser.add_argument("--rows", type=int, default=8, help="requests that are answered at a time (default: 8)")
    parser.add_argument(
        "--cache-tokens",
        type=int,
        help="that the cache holds, of all requests together (default: 1024 a row, or the context)",
    )
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait; others get 429 (default: 64)")
    parser.add_argument("--max-body-bytes", type=int, default=1 << 20, help="of a request, at most (default: 1048576)")
    parser.add_argument(
        "--request-seconds", type=float, default=600.0, help="that a request may take, waiting included (default: 600)"
    )
    parser.add_argument(
        "--drain-seconds", type=float, default=30.0, help="that running requests get after SIGTERM (default: 30)"
    )


def run(parser: Parser, argv: list[str]) -> None:
    """Serves until a signal comes."""
    arguments = parser.parse(argv)
    key = arguments.api_key if arguments.api_key is not None else os.environ.get(KEY_VARIABLE)
    if key is not None and (len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key):
        raise InputError(f"the API key must be {SHORTEST_KEY} or more characters of ASCII without blanks")
    if arguments.host != HOST and key is None:
        raise InputError(
            f"--host {arguments.host} needs --api-key or {KEY_VARIABLE}: without a key only {HOST} is valid"
        )
    if not 0 <= arguments.port < 2**16:
        raise InputError(f"--port {arguments.port} must be between 0 and {2**16 - 1}")
    if not 0 <= arguments.drain_seconds < math.inf:
        raise InputError(f"--drain-seconds {arguments.drain_seconds:g} must be 0 or more")
    if not 0 < arguments.request_seconds < math.inf:
        raise InputError(f"--request-seconds {arguments.request_seconds:g} must be above 0")
    if arguments.max_body_bytes < 1:
        raise InputError(f"--max-body-bytes {arguments.max_body_bytes} must be at least 1")
    check_drafting_arguments(arguments)
    try:
        from hsai.serve.app import make_app
        from hsai.serve.served import Limits, Served
        from hsai.serve.server import listen, name_address, run_server
    except ModuleNotFoundError as error:
        raise InputError(f"hsai serve needs {error.name}: pip install 'hsai[serve]'") from error
    share_heaps()
    limits = Limits(body_bytes=arguments.max_body_bytes, seconds=arguments.request_seconds)
    with listen(arguments.host, arguments.port) as listener:  # first: nothing is loaded in vain
        engine = trace_engine(arguments, context=arguments.context)
        service = Service(engine, rows=arguments.rows, tokens=arguments.cache_tokens, queue=arguments.queue)
        name = arguments.name or arguments.model.resolve().name.removesuffix(".gguf")
        defaults = read_defaults(engine.assets.generation_config)
        if defaults.ignored:
            print(f"note: generation_config.json's {', '.join(defaults.ignored)} is not applied", file=sys.stderr)
        served = Served(name=name, engine=engine, service=service, defaults=defaults, created=int(time.time()))
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what clients do wrong is answered, not logged
        run_server(
            make_app(served, limits, api_key=key),
            service,
            listener,
            drain_seconds=arguments.drain_seconds,
            on_ready=lambda: say(f"serving {name} at {name_address(listener)}"),
            on_stop=lambda: say("stopping: running requests get their answers first"),
        )
