"""What every server of a bundle shares: request fields, limits, proof before readiness, metrics, short messages.

``triton/`` and ``http/`` put it behind Triton and behind an HTTP endpoint.
"""
