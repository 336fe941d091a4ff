"""What can be built and what it costs: architectures, their graph, exact counts. Integers only, no torch."""

from .architecture import Architecture, Layer, Run
from .band import Band
from .cost import CostTable
from .errors import (
    ArchitectureError,
    BrokenDataError,
    BudgetError,
    ConfigError,
    DamagedError,
    DataError,
    ModelError,
    PoolshareError,
    RunError,
    SpaceError,
    TrainingError,
)
from .operators import OPERATORS, Operator
from .prefix_tree import Forecast, PrefixTree, forecast, forecast_space
from .quantities import BY_COLUMN, COSTS, Cost, budget_quantity, parse_budget
from .search_space import SearchSpace

__all__ = [
    "BY_COLUMN",
    "COSTS",
    "OPERATORS",
    "Architecture",
    "ArchitectureError",
    "Band",
    "BrokenDataError",
    "BudgetError",
    "ConfigError",
    "Cost",
    "CostTable",
    "DamagedError",
    "DataError",
    "Forecast",
    "Layer",
    "ModelError",
    "Operator",
    "PoolshareError",
    "PrefixTree",
    "Run",
    "RunError",
    "SearchSpace",
    "SpaceError",
    "TrainingError",
    "budget_quantity",
    "forecast",
    "forecast_space",
    "parse_budget",
]
