"""A process that renders chat templates: a line of JSON in, a line of JSON out, until its input ends.

A template is a program that came with a model. It runs in Jinja's sandbox, which keeps it from Python's internals; and
because no sandbox keeps it from doubling a text forty times, in a process of its own with bounded memory and time
(`hsai.data.chat` ends it at a deadline). Nothing of hsai is imported here, so the process starts in a moment.

What a template may use is what transformers gives it: loop controls, `generation` blocks, tojson, raise_exception,
strftime_now, dict, namespace.
"""

import functools
import json
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

MEMORY = 1 << 29
"""Bytes of address space."""


class Refusal(Exception):
    """What raise_exception says, and what bounds a template."""


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks what an assistant says; it is rendered like any other text."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """The block's content, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that begin with an underscore."""

    def __init__(*own: Any, **entries: Any) -> None:  # like Jinja's, so that an entry may be called self
        self, given = own[0], dict(*own[1:], **entries)
        for name in given:
            Namespace.check(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        Namespace.check(name)
        super().__setitem__(name, value)

    @staticmethod
    def check(name: str) -> None:
        """Refuses a name."""
        if name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace may not hold {name!r}")


def make_dict(*pairs: Any, **entries: Any) -> dict[Any, Any]:
    """`dict`, whose methods would be those of a class."""
    return dict(*pairs, **entries)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is; Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message: str) -> None:
    """Ends the rendering."""
    raise Refusal(f"says: {message}")


def tell_time(form: str) -> str:
    """Now, in this form."""
    return datetime.now().strftime(form)


@functools.lru_cache(maxsize=8)
def compile_template(source: str) -> jinja2.Template:
    """A template in the sandbox."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": tell_time,
        "dict": make_dict,
        "namespace": Namespace,
    }
    return environment.from_string(source)


def render(source: str, variables: dict[str, Any], characters: int) -> str:
    """The text, of at most so many characters."""
    pieces, length = [], 0
    for piece in compile_template(source).generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > characters:
            raise Refusal(f"makes more than {characters} characters")
    return "".join(pieces)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """The text, or why there is none."""
    try:
        return {"text": render(request["template"], request["variables"], request["characters"])}
    except Refusal as error:
        return {"error": str(error)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"is no Jinja: {error.message} (line {error.lineno})"}
    except jinja2.sandbox.SecurityError as error:
        return {"error": f"touches what it may not: {error}"}
    except MemoryError:
        return {"error": f"needs more than {MEMORY >> 20} MiB"}
    except RecursionError:
        return {"error": "calls itself without end"}
    except Exception as error:  # whatever a program of others may raise
        return {"error": f"fails: {type(error).__name__}: {error}"}


def main() -> None:
    """Answers requests."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # Should whoever asked be gone before its deadline, the system ends a template that loops.
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime + request["seconds"]) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        sys.stdout.buffer.write(json.dumps(answer(request)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
