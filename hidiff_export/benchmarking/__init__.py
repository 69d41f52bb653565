"""`bench`: evaluations of bundles and of their peers, taken in turn and compared in time, memory and what they give."""
