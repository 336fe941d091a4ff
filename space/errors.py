"""Every error poolshare raises on purpose: all ValueErrors, each naming the value, the place and the remedy."""


class PoolshareError(ValueError):
    """Something the user can put right; `exit_status` is what the command line leaves with (2: wrong use)."""

    exit_status = 2


class ArchitectureError(PoolshareError):
    """An architecture's text or JSON is malformed, or it is not a member of the space at hand."""


class SpaceError(PoolshareError):
    """A search space cannot exist as described, or does not fit the model."""


class BudgetError(PoolshareError):
    """A budget or a cost band that no architecture meets; the message names the reachable range."""


class ModelError(PoolshareError):
    """A model that timm does not know, or whose parts the supernet cannot run faithfully."""


class DataError(PoolshareError):
    """A data set that is missing, or that the task cannot use."""


class BrokenDataError(DataError):
    """A data set with files that cannot be read."""

    exit_status = 1


class ConfigError(PoolshareError):
    """An option has a value it cannot have."""


class TrainingError(PoolshareError):
    """Training cannot go on, for instance because the loss is not finite."""

    exit_status = 1


class RunError(PoolshareError):
    """A run or export folder that is foreign, damaged, in use, or continued with another configuration."""

    exit_status = 1


class DamagedError(RunError):
    """A file that can be read and is damaged, or not a poolshare file."""
