"""Supervision: each launched process is a supervisor that starts the training rank as its worker process.

The supervisor needs only the standard library, so it starts in a fraction of a second and survives most failures of a
rank. It reads the worker's heartbeat in shared memory and ends the worker at a deadline. The supervisors exchange small
files in the run directory (the rendezvous store) to agree on the end of an attempt and the next action. Rank 0's supervisor
is the coordinator.
"""
