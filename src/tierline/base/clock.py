"""Units of time, as whole numbers.

Time is an argument: nobody here reads a clock.  Instants and durations that decisions
compare are integers of picoseconds: fine enough that the cost of one cached token is a whole
number, so k equal steps add up exactly to k single ones, and a day still fits a machine word.
"""

PS_PER_S = 10**12
PS_PER_MS = 10**9
PS_PER_NS = 1000
FOREVER_PS = 1 << 62  # later than anything; no instant reaches it
