"""Downloads of weights by timm and others: a few tries, and one line where they fail."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from segdeformer.errors import UserError

MOST_RETRIES = 2  # of the hub's client, whose own five take half a minute, twice
HUB = "huggingface_hub"


class FewRetries(logging.Handler):
    """Hears the hub's client announce its retries, and ends the download at one too many."""

    def __init__(self, others: list[logging.Handler]) -> None:
        super().__init__()
        self.others = others
        self.num_retries = 0

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            for other in self.others:
                other.handle(record)
        elif record.getMessage().startswith("Retrying in "):
            self.num_retries += 1
            if self.num_retries > MOST_RETRIES:
                raise ConnectionError(f"no answer in {self.num_retries} tries")


@contextlib.contextmanager
def explained_download(name: str) -> Iterator[None]:
    """Weights that cannot be downloaded are one line, soon, without the hub client's line for every retry."""
    logger = logging.getLogger(HUB)
    level, handlers, propagate = logger.level, logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [FewRetries(handlers)], False
    logger.setLevel(logging.WARNING)
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the weights of `{name}` could not be downloaded ({type(error).__name__}); without a "
            "network, set encoder.weights to a .safetensors or .pth file in timm's names"
        ) from error
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
