"""Objectives: what is laid out, who sees whom, what is predicted, and with which loss. One page each, no loop."""
