"""Closed forms of queues, as oracles for a simulator. Rates per second, times in seconds.

One server with Poisson arrivals and any service (Pollaczek and Khinchine), of which constant
and exponential service are two cases; several servers with exponential service (Erlang C).
"""

import math
from dataclasses import dataclass


def mg1_wait_s(rate: float, *, service_s: float, service_cv2: float) -> float:
    """Mean time in the queue; `service_cv2` is the squared coefficient of variation.

    >>> round(mg1_wait_s(0.8, service_s=1.0, service_cv2=1.0), 9)
    4.0
    """
    load = rate * service_s
    assert 0 <= load < 1, "the queue grows without end"
    return load / (1 - load) * service_s * (1 + service_cv2) / 2


def md1_wait_s(rate: float, *, service_s: float) -> float:
    """Mean time in the queue when every service takes the same.

    >>> round(md1_wait_s(0.8, service_s=1.0), 9)
    2.0
    """
    return mg1_wait_s(rate, service_s=service_s, service_cv2=0.0)


def mm1_wait_s(rate: float, *, service_s: float) -> float:
    """Mean time in the queue when services are exponential."""
    return mg1_wait_s(rate, service_s=service_s, service_cv2=1.0)


def erlang_b(offered: float, *, servers: int) -> float:
    """Probability that all servers are busy when nobody waits, by its stable recursion."""
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = offered * blocked / (n + offered * blocked)
    return blocked


def erlang_c(offered: float, *, servers: int) -> float:
    """Probability that an arrival waits; `offered` is rate x service, in servers.

    >>> round(erlang_c(8, servers=10), 4)
    0.4092
    """
    assert 0 <= offered < servers, "the queue grows without end"
    blocked = erlang_b(offered, servers=servers)
    return blocked / (1 - offered / servers * (1 - blocked))


@dataclass(frozen=True, slots=True, kw_only=True)
class MMc:
    """Several servers, Poisson arrivals, exponential service, one queue."""

    rate: float
    service_s: float
    servers: int

    @property
    def offered(self) -> float:
        """Servers that are busy on average."""
        return self.rate * self.service_s

    @property
    def waits(self) -> float:
        """Share of requests that wait at all."""
        return erlang_c(self.offered, servers=self.servers)

    @property
    def drain_s(self) -> float:
        """Mean wait of those that wait, which is exponential."""
        return self.service_s / (self.servers - self.offered)

    @property
    def wait_s(self) -> float:
        """Mean time in the queue over all requests."""
        return self.waits * self.drain_s

    @property
    def queued(self) -> float:
        """Mean number in the queue (Little)."""
        return self.rate * self.wait_s

    def wait_quantile_s(self, share: float) -> float:
        """The wait that a share of requests does not exceed."""
        assert 0 <= share < 1
        return max(0.0, self.drain_s * math.log(self.waits / (1 - share)))
