"""The Python program of `python -m benchmarks.guest`: objects, dictionaries, strings, regular expressions, JSON, big integers.

Prints a digest of all that it computed, the same one on each machine.
"""

import hashlib
import json
import re
from collections.abc import Iterator

SIZE = 3000


class Account:
    """Something with methods and state."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.balance = 0

    def move(self, amount: int) -> "Account":
        self.balance = (self.balance * 31 + amount) % 1_000_003
        return self


def accounts() -> int:
    """Method calls and attributes."""
    many = [Account(number) for number in range(50)]
    for turn in range(SIZE * 4):
        many[turn % 50].move(turn)
    return sum(account.balance for account in many)


def words() -> list[tuple[str, int]]:
    """Strings, dictionaries and sorting."""
    count: dict[str, int] = {}
    for number in range(SIZE * 4):
        word = f"w{number * 7919 % 997:x}"
        count[word] = count.get(word, 0) + 1
    return sorted(count.items(), key=lambda item: (-item[1], item[0]))[:20]


def matches() -> int:
    """Regular expressions over text."""
    text = " ".join(f"{number}:{number * number:x}" for number in range(SIZE))
    return len(re.findall(r"\b\d*7\d*:[0-9a-f]*a", text))


def documents() -> int:
    """JSON there and back."""
    value = [{"id": number, "name": f"n{number}", "tags": [number % 3, number % 7]} for number in range(SIZE // 4)]
    return sum(item["tags"][1] for item in json.loads(json.dumps(value)))


def digits() -> str:
    """Digits of pi by Gibbons' spigot: big integers in a generator."""

    def spigot() -> Iterator[int]:
        q, r, t, k, n, m = 1, 0, 1, 1, 3, 3
        while True:
            if 4 * q + r - t < n * t:
                yield n
                q, r, n = 10 * q, 10 * (r - n * t), 10 * (3 * q + r) // t - 10 * n
            else:
                q, r, t, n, k, m = q * k, (2 * q + r) * m, t * m, (q * (7 * k + 2) + r * m) // (t * m), k + 1, m + 2

    source = spigot()
    return "".join(str(next(source)) for _ in range(SIZE // 15))


results = [accounts(), words(), matches(), documents(), digits()]
print(hashlib.sha256(repr(results).encode()).hexdigest())
