"""The features room: which inputs and columns matter."""

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.features.outrank.mutual_info import ca_mutual_info
    from salience.features.outrank.ranking import rank_table
    from salience.features.outrank.report import RankReport
    from salience.features.outrank.selector import OutRankSelector

_WHERE: dict[str, str] = {
    "OutRankSelector": "outrank.selector", "RankReport": "outrank.report",
    "ca_mutual_info": "outrank.mutual_info", "rank_table": "outrank.ranking",
}  # fmt: skip
__all__ = ["OutRankSelector", "RankReport", "ca_mutual_info", "rank_table"]
__getattr__, __dir__ = exports(__name__, _WHERE)
