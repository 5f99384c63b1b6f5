"""The operators that a plan can name. A new one is a file here and an entry below."""

from ..operator import Operator
from . import extend_spectrum, lift_keys, merge_heads, outer_product, widen_state

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        outer_product.OPERATOR,
        merge_heads.OPERATOR,
        widen_state.OPERATOR,
        lift_keys.OPERATOR,
        extend_spectrum.OPERATOR,
    )
}
