/* What the benchmarks of the guest program share: the table of cases, and values that repeat everywhere. */
#ifndef BENCH_H
#define BENCH_H

#include <stddef.h>
#include <stdint.h>

/* One case. `pass` does `operations` operations and returns a checksum of what it computed, the same one each time and on each machine. */
struct bench {
	const char *name;
	uint64_t (*pass)(void);
	unsigned operations;
};

extern const struct bench integer_cases[], call_cases[], copy_cases[], float_cases[], system_cases[];

/* The program's own path, for a case that executes it again. */
extern const char *own_path;

#define NOINLINE __attribute__((noinline))

/* Keeps the compiler from turning a loop into a call of memcpy() or into vector code. */
#define KEEP_LOOP() __asm__ volatile("" ::: "memory")

/* xorshift64: the same numbers on each machine. */
static inline uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* Fowler-Noll-Vo 1a, 64 bits. */
#define FNV_START 0xcbf29ce484222325u

static inline uint64_t fnv(uint64_t hash, const void *data, size_t size)
{
	const unsigned char *byte = data;

	while (size--)
		hash = (hash ^ *byte++) * 0x100000001b3u;
	return hash;
}

#endif
