"""The JSON of requests and responses, as OpenAI's API has it, and how what is wrong with a request is said.

Every field that is accepted is obeyed; any other is refused by name. What numbers may be is not repeated here: the
engine's SamplingParams holds the bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from ..errors import did_you_mean

MAX_MESSAGES = 4096
MAX_TOOLS = 128

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "abort"]
T = TypeVar("T", bound="Strict")


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    TYPES: ClassVar[Mapping[int, str]] = {
        401: "authentication_error",
        404: "not_found_error",
        429: "rate_limit_error",
        500: "server_error",
        503: "service_unavailable_error",
        504: "timeout_error",
    }

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = self.TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Strict(BaseModel):
    """A JSON object that has these keys and no other, each of its own type."""

    model_config = ConfigDict(extra="forbid", strict=True)

    REFUSED: ClassVar[Mapping[str, str]] = {}
    """Fields that other servers know, and why this one refuses them."""

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, value: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for name in value if isinstance(value, Mapping) else ():
            if name not in known:
                why = cls.REFUSED.get(name) or did_you_mean(str(name), known)
                text = "not supported" if name in cls.REFUSED else "no such field"
                said = {"field": str(name)[:80], "text": text + (f"; {why}" if why else "")}
                raise PydanticCustomError("unknown_field", "{text}", said)
        return value


# --- requests --------------------------------------------------------------------------------------------------------


class TextPart(Strict):
    REFUSED: ClassVar[Mapping[str, str]] = dict.fromkeys(("image_url", "input_audio", "file"), "text only")

    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    name: str
    arguments: str
    """JSON."""


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    role: Role
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    """Given back by clients that send an answer on as it came."""

    @model_validator(mode="after")
    def _whole(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("no_content", "a message without content")
        for field, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, field) is not None and self.role != role:
                said = {"field": field, "text": f"only a message of role {role!r} may have it"}
                raise PydanticCustomError("misplaced_field", "{text}", said)
        return self


class Function(Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.:-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None
    """Arguments keep to the schema wherever a call is enforced, whatever stands here."""


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Strict):
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Strict):
    include_usage: bool = False


class Generate(Strict):
    """What both kinds of request have."""

    model: str
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Whoever asks; nothing depends on it."""

    @model_validator(mode="after")
    def _streams(self) -> Generate:
        if self.stream_options is not None and not self.stream:
            said = {"field": "stream_options", "text": "only with stream"}
            raise PydanticCustomError("misplaced_field", "{text}", said)
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Generate):
    """POST /v1/chat/completions."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "chat_template": "the model's own template is used, none that a request brings",
        "functions": "say tools",
        "function_call": "say tool_choice",
        "audio": "text only",
        "modalities": "text only",
    }

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None


class CompletionRequest(Generate):
    """POST /v1/completions."""

    REFUSED: ClassVar[Mapping[str, str]] = {"suffix": "text is only continued, not filled in"}

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    best_of: int | None = None
    """Only what n is."""


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or messages in the chat template."""

    model: str | None = None
    """May be left out where one model is served."""
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = True
    """Whether a text gets what the model wants around it, such as a start token; messages have what they need."""
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of", "one of prompt and messages is needed, and only one")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


# --- responses -------------------------------------------------------------------------------------------------------


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorInfo


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Measured(BaseModel):
    """What this request was served with."""

    ttft_s: float | None
    """Seconds from the request to the first token."""
    tokens_per_s: float | None
    """Of all choices together, from the first token on; null for a single token."""
    acceptance_rate: float | None
    """Share of drafted tokens that were right while this request ran; null without drafts."""


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    gossamer: Measured


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class CalledFunction(BaseModel):
    name: str
    arguments: str


class Called(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Answer(BaseModel):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[Called] | None = None


class ChatChoice(BaseModel):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    logprob: float
    decoded_token: str


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    """Most tokens of prompt and answer together; null while the engine starts again."""


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int | None
    tokens: list[int]


class DetokenizeResponse(BaseModel):
    prompt: str


class Health(BaseModel):
    status: Literal["ok", "draining", "unavailable"]
    models: dict[str, Literal["ready", "restarting"]]


class Version(BaseModel):
    version: str


# --- what is wrong with a request ------------------------------------------------------------------------------------


def read_as(kind: type[T], value: Any) -> T:
    """A parsed body as a request. Raises ApiError, 400, that names the field."""
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {_shown(value)}, expected a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        rows = [(_path(row), row) for row in error.errors(include_url=False)]
        raise _refusal(*max(rows, key=lambda row: len(row[0]))) from None  # of a union, the branch that came furthest


def _path(row: ErrorDetails) -> list[str]:
    """Where it is, as keys and numbers of the JSON: what pydantic says of the branches of unions is left out."""
    parts = [*row["loc"], *([row["ctx"]["field"]] if "field" in row.get("ctx", {}) else [])]
    return [str(part) for part in parts if isinstance(part, int) or _is_key(part)]


def _is_key(part: str) -> bool:
    return "[" not in part and not part[:1].isupper() and part not in ("str", "int", "float", "bool")


def _refusal(path: list[str], row: ErrorDetails) -> ApiError:
    param = ".".join(path)
    what = row["msg"].replace("Input should be", "expected").replace("Field required", "it is needed")
    if row["type"] in ("unknown_field", "misplaced_field", "missing", "no_content", "one_of"):
        return ApiError(400, f"{param}: {what}" if param else what, param or None)
    return ApiError(400, f"{param or 'the body'} is {_shown(row['input'])}, {what}", param or None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
