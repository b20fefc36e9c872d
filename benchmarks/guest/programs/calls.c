/* Calls and jumps: a sort with callbacks, a walk of a list, calls through pointers, recursion. */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

#define NUMBERS 2000

static int numbers[NUMBERS];

static int ascending(const void *a, const void *b)
{
	int left = *(const int *)a, right = *(const int *)b;

	return (left > right) - (left < right);
}

static uint64_t sort_pass(void)
{
	uint64_t seed = 4;

	for (int at = 0; at < NUMBERS; at++)
		numbers[at] = next_random(&seed);
	qsort(numbers, NUMBERS, sizeof *numbers, ascending);
	return fnv(FNV_START, numbers, sizeof numbers);
}

/* A cycle through all nodes in random order: each load waits for the one before. 32 KB of nodes. */

#define NODES 2048
#define STEPS 100000

static struct node {
	struct node *next;
	uint64_t value;
} nodes[NODES];

static void link_nodes(void)
{
	unsigned order[NODES];
	uint64_t seed = 5;

	for (unsigned at = 0; at < NODES; at++)
		order[at] = at;
	for (unsigned at = NODES - 1; at > 0; at--) {
		unsigned other = next_random(&seed) % (at + 1), kept = order[at];

		order[at] = order[other];
		order[other] = kept;
	}
	for (unsigned at = 0; at < NODES; at++)
		nodes[order[at]] = (struct node){ &nodes[order[(at + 1) % NODES]], next_random(&seed) };
}

static uint64_t walk_pass(void)
{
	const struct node *node = nodes;
	uint64_t sum = 0;

	if (!nodes->next)
		link_nodes();
	for (unsigned step = 0; step < STEPS; step++, node = node->next)
		sum += node->value;
	return sum;
}

/* Calls through a table, of which one cannot foresee the next. */

#define CALLS 100000

static NOINLINE uint64_t f0(uint64_t x) { return x + 1; }
static NOINLINE uint64_t f1(uint64_t x) { return x ^ 0x55; }
static NOINLINE uint64_t f2(uint64_t x) { return x * 3; }
static NOINLINE uint64_t f3(uint64_t x) { return x - 7; }
static NOINLINE uint64_t f4(uint64_t x) { return x << 1 | x >> 63; }
static NOINLINE uint64_t f5(uint64_t x) { return ~x; }
static NOINLINE uint64_t f6(uint64_t x) { return x + (x >> 8); }
static NOINLINE uint64_t f7(uint64_t x) { return x ^ x >> 3; }

static uint64_t (*volatile const functions[8])(uint64_t) = { f0, f1, f2, f3, f4, f5, f6, f7 };

static uint64_t indirect_pass(void)
{
	uint64_t seed = 6, value = 1;

	for (int call = 0; call < CALLS; call++)
		value = functions[next_random(&seed) & 7](value);
	return value;
}

/* One function, called through a pointer by one place. */
static uint64_t pointer_pass(void)
{
	uint64_t value = 1;

	for (int call = 0; call < CALLS; call++)
		value = functions[2](value);
	return value;
}

static NOINLINE unsigned fibonacci(unsigned n)
{
	unsigned sum = 0;

	for (; n >= 2; n -= 2)
		sum += fibonacci(n - 1);
	return sum + n;
}

#define DEPTH 22
#define RECURSIVE_CALLS 28657 /* of fibonacci(22) */

static uint64_t recursion_pass(void)
{
	return fibonacci(DEPTH);
}

const struct bench call_cases[] = {
	{ "sort", sort_pass, NUMBERS },
	{ "list-walk", walk_pass, STEPS },
	{ "indirect-calls", indirect_pass, CALLS },
	{ "pointer-calls", pointer_pass, CALLS },
	{ "recursion", recursion_pass, RECURSIVE_CALLS },
	{ NULL, NULL, 0 },
};
