"""What a run came to."""

from dataclasses import asdict, dataclass, field

DONE, EARLY = "all steps done", "early stopping"
"""How the reason begins why a run has come to its end."""


@dataclass
class Summary:
    """What a run came to; written to summary.json."""

    steps: int = 0
    planned_steps: int = 0
    pairs: int = 0
    tokens: int = 0
    """Tokens of whole sequences. A prompt counts in each response's sequence, whether it was computed once or twice;
    padding does not count."""
    seconds: float = 0.0
    """Time in training steps, without evaluation and saving."""
    tokens_per_second: float = 0.0
    fill: float = 0.0
    """Token slots of the forward passes over those that tokens-per-batch allows."""
    padding: float = 0.0
    """Share of the slots that held no token."""
    shared: float = 0.0
    """Share of the tokens that prefix sharing did not have to compute."""
    peak_memory_gib: float = 0.0
    stopped: str = DONE
    saved: dict[str, str] = field(default_factory=dict)
    """Of model/ and best/: the step after which it was saved, or why it could not be."""
    eval_before: dict[str, float] = field(default_factory=dict)
    eval_after: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best_value: float | None = None

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end, and nothing has ended it."""
        return self.stopped.startswith((DONE, EARLY))

    def as_dict(self) -> dict[str, object]:
        """Give all fields, for JSON."""
        return asdict(self)
