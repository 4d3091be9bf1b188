"""A model behind HTTP, in the form of OpenAI's API: what `hsai serve` runs.

A connection (`protocol.py`) has deadlines, a gate (`gate.py`) before everything asks for the key, `app.py` knows the
paths. A body (`body.py`) becomes JSON (`json_body.py`), whose fields are read strictly (`fields.py`, `options.py`) into
what is wanted (`chat.py`, `completion.py`). The service of `hsai.infer` answers with events, which an exchange
(`exchange.py`) brings to the event loop, and they leave in OpenAI's forms (`answers.py`, `respond.py`), as they come or
at once (`generate.py`). Every refusal is an error object (`errors.py`). `metrics.py` counts, `server.py` starts and
drains, `page.html` is the chat page.

Nothing here knows how the service works.
"""
