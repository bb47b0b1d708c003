"""The performance goals, measured: each figure beside a baseline and a limit of the same run, as ratios.

The machine may be shared and slow, which moves absolute times but hardly the ratios and the CPU time of a request.
"""
