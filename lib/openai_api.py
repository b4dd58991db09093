"""Requests and responses of the chat server (lib/server.py): OpenAI's chat completions, completions
and models.

The format is https://platform.openai.com/docs/api-reference, for text. Unsupported options are
rejected, not ignored. Errors are {"error": {"message", "type", "param", "code"}}.
"""

import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lib.chat_template import check_messages, render
from lib.cli import BadInput
from lib.decoding import NonFinite, SampleConfig
from lib.serving import Busy, Closed, Engine, Reply, Request

# Fields of a request. All others are unknown and rejected, as OpenAI does.
USED = {"model", "max_tokens", "temperature", "top_p", "stop", "stream", "stream_options", "seed"}
FIELDS = {"chat": USED | {"messages", "max_completion_tokens"}, "text": USED | {"prompt"}}
IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "parallel_tool_calls", "tool_choice",
}
# Fields accepted with their default values only.
DEFAULTS_ONLY: dict[str, tuple] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
MAX_STOPS = 16
COMPLETION_TOKENS = 16  # OpenAI's default for completions
TYPE_NAMES: dict[Any, str] = {
    int: "an integer",
    (int, float): "a number",
    bool: "true or false",
    str: "text",
    dict: "an object",
}
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response: its HTTP status and message, the field it concerns, OpenAI's code for it,
    and HTTP headers."""

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict:
        kind = ERROR_TYPES.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def as_api_error(error: Exception) -> ApiError:
    """The response for an error of the engine."""
    if isinstance(error, Busy):
        return ApiError(429, "the request queue is full: try again in a moment",
                        code="rate_limit_exceeded", headers={"Retry-After": "1"})
    if isinstance(error, Closed):
        return ApiError(503, "the server is stopping", code="server_stopping")
    message = f"the model failed ({type(error).__name__})"
    if isinstance(error, NonFinite):
        message = str(error)
    return ApiError(500, message, code="model_error")


# --------------------------------------------------------------------------------------------------
# Fields of a request. All raise ApiError.


def read_value(body: dict, name: str, default: Any, kind: Any, low: float | None = None,
               high: float | None = None) -> Any:
    """A field, or `default` if it is missing or null. Raises ApiError on another type than `kind`,
    or outside the bounds."""
    value = body.get(name)
    if value is None:
        return default
    is_bool = isinstance(value, bool)  # Python counts bool as int
    if not isinstance(value, kind) or (is_bool and kind is not bool):
        raise ApiError(400, f"{name} must be {TYPE_NAMES[kind]}", name, "invalid_type")
    if low is not None and not low <= value <= high:  # NaN fails, too
        raise ApiError(400, f"{name} must be between {low} and {high}", name, "invalid_value")
    return value


def read_stop(body: dict) -> tuple[str, ...]:
    """The stop strings."""
    stop = body.get("stop")
    if stop is None:
        return ()
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, list) or not all(isinstance(string, str) for string in stop):
        raise ApiError(400, "stop must be text or a list of text", "stop", "invalid_type")
    if len(stop) > MAX_STOPS or any(not 0 < len(string) <= 1000 for string in stop):
        raise ApiError(400, f"stop must be at most {MAX_STOPS} strings of 1 to 1,000 characters",
                       "stop", "invalid_value")
    return tuple(stop)


def read_messages(body: dict) -> list[dict]:
    """The conversation, with contents as text."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        messages = []
    plain = [read_message(message) for message in messages]
    try:
        check_messages(plain)
    except BadInput as error:
        raise ApiError(400, f"messages: {error}", "messages", "invalid_value") from error
    if plain[-1]["role"] != "user":
        raise ApiError(400, "messages: the last one must be the user's", "messages",
                       "invalid_value")
    return plain


def read_message(message: Any) -> Any:
    """One message; OpenAI's developer messages become system messages."""
    if not isinstance(message, dict):
        return message  # check_messages refuses it
    check_keys(message, {"role", "content", "name"}, "messages")  # the template drops names
    role = message.get("role")
    if role == "developer":
        role = "system"
    return {"role": role, "content": read_content(message.get("content"))}


def read_content(content: Any) -> Any:
    """The content of a message; a list of text parts becomes one text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise ApiError(400, "only parts of type text are supported in a content", "messages",
                           "unsupported_value")
        texts.append(part["text"])
    for part in content:
        check_keys(part, {"type", "text"}, "messages")
    return "".join(texts)


def read_prompt(body: dict) -> str:
    """The prompt of a completion."""
    prompt = body.get("prompt", "")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise ApiError(400, "prompt must be text, or a list of one text", "prompt", "invalid_type")
    return prompt


def check_keys(part: dict, known: Collection[str], param: str) -> None:
    """Raises ApiError if an object in a request has an unknown key, unless its value is null, false
    or empty and so has no effect."""
    for name, value in part.items():
        if value and name not in known:
            raise ApiError(400, f"{name[:60]} is not supported within {param}", param,
                           "unsupported_value")


def check_fields(body: dict, kind: str) -> None:
    """Raises ApiError on unknown fields and unsupported options."""
    for name, value in body.items():
        if name in FIELDS[kind] or name in IGNORED:
            continue
        if name not in DEFAULTS_ONLY:
            raise ApiError(400, f"Unrecognized request argument supplied: {name[:60]}", name[:60],
                           "unknown_parameter")
        allowed = DEFAULTS_ONLY[name]
        is_default = any(value == one and type(value) is type(one) for one in allowed)
        if value is not None and not is_default:
            raise ApiError(400, f"{name} is not supported here, other than {allowed[0]!r}", name,
                           "unsupported_value")


# --------------------------------------------------------------------------------------------------
# Requests and responses


@dataclass
class Api:
    """The API of one model. name: the model's name. defaults: for fields missing in a request.
    api_key: key that clients must send, or None."""
    engine: Engine
    name: str
    defaults: SampleConfig
    api_key: str | None = None

    def __post_init__(self):
        self.created = int(time.time())

    def model(self) -> dict:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "local",
            # not OpenAI's, for our page
            "context_length": self.engine.window,
            "temperature": self.defaults.temperature,
        }

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(404, f"The model {name[:80]!r} does not exist: here it is {self.name}",
                           "model", "model_not_found")

    def read(self, body: Any, kind: str) -> tuple[Request, bool]:
        """The body of a request, "chat" or "text" -> (Request, whether its stream ends with the
        usage). Raises ApiError.

        Any model name is accepted for the one model: many clients insist on their own.
        """
        if not isinstance(body, dict):
            raise ApiError(400, "the body must be a JSON object", code="invalid_type")
        check_fields(body, kind)
        if read_value(body, "model", None, str) is None:
            raise ApiError(400, f"name a model: here it is {self.name}", "model",
                           "missing_required_parameter")
        stream = read_value(body, "stream", False, bool)
        options = read_value(body, "stream_options", {}, dict)
        if options and not stream:
            raise ApiError(400, "stream_options is for stream: true", "stream_options",
                           "invalid_value")
        check_keys(options, {"include_usage"}, "stream_options")
        with_usage = read_value(options, "include_usage", False, bool)
        ids = self.prompt_ids(body, kind)
        limit = self.defaults.max_new_tokens if kind == "chat" else COMPLETION_TOKENS
        for name in ("max_tokens", "max_completion_tokens"):
            limit = read_value(body, name, limit, int, 1, 2**31)
        seed = read_value(body, "seed", None, int, -2**63, 2**63 - 1)
        if seed is not None:
            seed %= 2**63
        number = (int, float)
        temperature = read_value(body, "temperature", self.defaults.temperature, number, 0, 2)
        top_p = read_value(body, "top_p", self.defaults.top_p, number, 1e-6, 1)
        stop = read_stop(body) or self.defaults.stop or ()
        request = Request(ids, limit, float(temperature), float(top_p), stop, seed, stream)
        return request, with_usage

    def prompt_ids(self, body: dict, kind: str) -> list[int]:
        """The token ids of a request's prompt. Raises ApiError if they do not fit the context."""
        tokenizer = self.engine.tokenizer
        if kind == "chat":
            param = "messages"
            ids, _ = render(read_messages(body), tokenizer, reply=True)
        else:
            param = "prompt"
            ids = tokenizer.encode(read_prompt(body)).tolist() or [tokenizer.eot]
        window = self.engine.window
        if len(ids) >= window:
            raise ApiError(400, f"the prompt has {len(ids):,} tokens, and the context of "
                           f"{window:,} has room for {window - 1:,}: shorten it", param,
                           "context_length_exceeded")
        return ids

    def submit(self, request: Request) -> Reply:
        """Queue a request. Raises ApiError."""
        try:
            return self.engine.submit(request)
        except (Busy, Closed) as error:
            raise as_api_error(error) from error

    def head(self, kind: str) -> dict:
        """The fields that all responses to one request share."""
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": "chat.completion" if kind == "chat" else "text_completion",
            "created": int(time.time()),
            "model": self.name,
        }


def choice(content: dict, ended: str | None) -> dict:
    """The only choice of a response."""
    return {"index": 0, **content, "logprobs": None, "finish_reason": ended}


def whole_response(head: dict, kind: str, reply: Reply) -> dict:
    """The response of a finished request that is not streamed."""
    content: dict = {"text": reply.text}
    if kind == "chat":
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        content = {"message": message}
    return {**head, "choices": [choice(content, reply.ended)], "usage": usage(reply)}


def usage(reply: Reply) -> dict:
    prompt = len(reply.request.ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": reply.count,
        "total_tokens": prompt + reply.count,
    }


class Chunks:
    """The chunks of a streamed response."""

    def __init__(self, head: dict, kind: str, with_usage: bool):
        self.kind = kind
        self.with_usage = with_usage
        self.head = dict(head)
        if kind == "chat":
            self.head["object"] = "chat.completion.chunk"
        if with_usage:
            self.head["usage"] = None

    def first(self) -> list[dict]:
        if self.kind == "chat":
            return [self.chunk({"delta": {"role": "assistant", "content": ""}})]
        return []

    def piece(self, text: str) -> dict:
        if self.kind == "chat":
            return self.chunk({"delta": {"content": text}})
        return self.chunk({"text": text})

    def last(self, reply: Reply) -> list[dict]:
        content: dict = {"delta": {}} if self.kind == "chat" else {"text": ""}
        chunks = [self.chunk(content, reply.ended)]
        if self.with_usage:
            chunks.append({**self.head, "choices": [], "usage": usage(reply)})
        return chunks

    def chunk(self, content: dict, ended: str | None = None) -> dict:
        return {**self.head, "choices": [choice(content, ended)]}
