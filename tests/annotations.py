"""The annotations of tensors, checked whenever a function of the core is called: what the import hook in `conftest.py` applies."""

from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray
from torch import Tensor


def mentions_tensor(hint: Any) -> bool:
    if isinstance(hint, type):
        return issubclass(hint, AbstractArray | Tensor)
    return any(mentions_tensor(part) for part in get_args(hint))


def check_tensors(function: Any) -> Any:
    """beartype's checks of the arguments and results that are tensors; in place of everything else a test may pass a stand-in."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if mentions_tensor(hint)}
    return beartype(function) if function.__annotations__ else function
