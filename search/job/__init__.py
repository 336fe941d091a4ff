"""One search from its configuration to its report, and the run folder that the verbs share."""
