"""What clients say of answers, and how the router learns from it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from polymath.errors import InvalidRequest, NotFound
from polymath.gateway.protocol import Wire
from polymath.proxy import text_of

__all__ = ["FeedbackRequest", "judged", "training_rows"]


class FeedbackRequest(Wire):
    """Body of `POST /v1/feedback`: a completion's id, and the right expert or a thumb, or both."""

    id: str = Field(min_length=1, max_length=256)
    expert: str | None = Field(default=None, max_length=128)
    thumbs: Literal["up", "down"] | None = None
    comment: str | None = Field(default=None, max_length=4000)

    @model_validator(mode="after")
    def _says_something(self) -> FeedbackRequest:
        if self.expert is None and self.thumbs is None:
            raise PydanticCustomError(
                "missing_opinion", "give `expert` or `thumbs`", {"param": "expert"}
            )
        return self


def judged(
    said: FeedbackRequest,
    decision: Mapping[str, Any] | None,
    owner: str,
    keeps_prompt: bool,
    experts: Collection[str],
    now: float,
) -> dict[str, Any]:
    """What is kept of a piece of feedback.

    Args:
        decision: on the completion.
        owner: who says it.
        keeps_prompt: whether the prompt may be kept with it.
        now: seconds since 1970.
    Raises:
        NotFound: the completion is not remembered.
        InvalidRequest: nobody is called as the expert.
    """
    if decision is None:
        raise NotFound(f"The completion {said.id!r} is not remembered.", param="id")
    if said.expert is not None and said.expert not in experts:
        raise InvalidRequest(f"There is no expert {said.expert!r}.", param="expert")
    entry = {
        "time": round(now, 3),
        **said.model_dump(exclude_none=True, exclude={"expert"}),
        "key": owner,
        "answered": decision["expert"],
        "domain": decision["domain"],
        "right": said.expert or (decision["expert"] if said.thumbs == "up" else None),
    }
    if keeps_prompt and "messages" in decision:
        entry["messages"] = decision["messages"]
    return entry


def training_rows(
    feedback: Iterable[Mapping[str, Any]], domains: Mapping[str, str]
) -> Iterator[dict[str, str]]:
    """Labelled prompts for `polymath train router`: of feedback that says who was right and whose
    prompt was kept.

    Args:
        domains: expert -> the domain that it answers.
    """
    for entry in feedback:
        right = entry.get("right")
        turns = [turn for turn in entry.get("messages", ()) if turn.get("role") == "user"]
        if right in domains and turns:
            yield {
                "text": text_of(turns[-1].get("content")),
                "domain": domains[str(right)],
                "source": "feedback",
            }
