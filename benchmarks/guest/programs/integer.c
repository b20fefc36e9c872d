/*
 * Integer work of the kinds that CoreMark measures, in code of our own: sorting and searching a linked list, a matrix product, a state
 * machine over text, and a CRC over the results.
 */
#include "bench.h"

#include <string.h>

/* CRC-32 (IEEE 802.3), by table. */

static uint32_t crc_table[256];

static uint32_t crc32(uint32_t crc, const unsigned char *data, size_t size)
{
	if (!crc_table[1])
		for (uint32_t byte = 0; byte < 256; byte++) {
			uint32_t value = byte;

			for (int bit = 0; bit < 8; bit++)
				value = value & 1 ? value >> 1 ^ 0xedb88320 : value >> 1;
			crc_table[byte] = value;
		}
	crc = ~crc;
	while (size--)
		crc = crc >> 8 ^ crc_table[(crc ^ *data++) & 0xff];
	return ~crc;
}

static unsigned char text[16384];

static uint64_t crc_pass(void)
{
	uint64_t seed = 1;

	if (!text[0])
		for (size_t at = 0; at < sizeof text; at++)
			text[at] = next_random(&seed) | 1;
	return crc32(0, text, sizeof text);
}

/* A matrix product of 16-bit integers into 32-bit sums, then bits out of each. */

#define ORDER 40

static int16_t left[ORDER][ORDER], right[ORDER][ORDER];
static int32_t product[ORDER][ORDER];

static uint64_t matrix_pass(void)
{
	uint64_t seed = 2;
	uint32_t sum = 0;

	for (int row = 0; row < ORDER; row++)
		for (int column = 0; column < ORDER; column++) {
			left[row][column] = next_random(&seed);
			right[row][column] = next_random(&seed);
		}
	for (int row = 0; row < ORDER; row++)
		for (int column = 0; column < ORDER; column++) {
			uint32_t total = 0;

			for (int at = 0; at < ORDER; at++)
				total += left[row][at] * right[at][column];
			product[row][column] = total;
		}
	for (int row = 0; row < ORDER; row++)
		for (int column = 0; column < ORDER; column++)
			sum = sum * 31 + (product[row][column] >> 2 & 0xf) * (product[row][column] >> 5 & 0x7f);
	return sum;
}

/* A state machine: which of the words of a text are integers, fractions or numbers with an exponent. */

enum state { START, SIGN, WHOLE, POINT, FRACTION, MARK, POWER_SIGN, POWER, NO_NUMBER, STATES };

static const char words[] = "5012,1.2e3,-874,+122.5,.1,-.12e-7,87.e9,T0.3e-1F,-T.T++Tq,1T3.4e4z,34.0e-T^,5.500e+3,-.123e-2,12e+,0xff,";

static NOINLINE enum state step(enum state state, char c)
{
	int digit = c >= '0' && c <= '9';

	switch (state) {
	case START:
		return digit ? WHOLE : c == '+' || c == '-' ? SIGN : c == '.' ? POINT : NO_NUMBER;
	case SIGN:
		return digit ? WHOLE : c == '.' ? POINT : NO_NUMBER;
	case WHOLE:
		return digit ? WHOLE : c == '.' ? FRACTION : c == 'e' ? MARK : NO_NUMBER;
	case POINT:
		return digit ? FRACTION : NO_NUMBER;
	case FRACTION:
		return digit ? FRACTION : c == 'e' ? MARK : NO_NUMBER;
	case MARK:
		return digit ? POWER : c == '+' || c == '-' ? POWER_SIGN : NO_NUMBER;
	case POWER_SIGN:
	case POWER:
		return digit ? POWER : NO_NUMBER;
	default:
		return NO_NUMBER;
	}
}

static uint64_t state_pass(void)
{
	uint32_t seen[STATES] = { 0 }, ends[STATES] = { 0 };

	for (int turn = 0; turn < 100; turn++) {
		enum state state = START;

		for (const char *c = words; *c; c++) {
			if (*c == ',') {
				ends[state]++;
				state = START;
			} else {
				state = step(state, *c);
				seen[state]++;
			}
		}
	}
	return fnv(fnv(FNV_START, seen, sizeof seen), ends, sizeof ends);
}

/* A linked list: built, searched, reversed, merge-sorted by two orders. */

#define ITEMS 500

struct item {
	struct item *next;
	int16_t key, index;
};

static struct item items[ITEMS];

static int by_key(const struct item *a, const struct item *b)
{
	return a->key != b->key ? a->key - b->key : a->index - b->index;
}

static int by_index(const struct item *a, const struct item *b)
{
	return a->index - b->index;
}

static struct item *merge(struct item *a, struct item *b, int (*compare)(const struct item *, const struct item *))
{
	struct item *first, **last = &first;

	while (a && b) {
		struct item **less = compare(a, b) <= 0 ? &a : &b;

		*last = *less;
		last = &(*less)->next;
		*less = *last;
	}
	*last = a ? a : b;
	return first;
}

static struct item *sort(struct item *list, int (*compare)(const struct item *, const struct item *))
{
	struct item *middle = list, *half;

	if (!list || !list->next)
		return list;
	for (struct item *end = list->next; end && end->next; end = end->next->next)
		middle = middle->next;
	half = middle->next;
	middle->next = NULL;
	return merge(sort(list, compare), sort(half, compare), compare);
}

static uint64_t list_pass(void)
{
	struct item *list = items, *reversed = NULL;
	uint64_t seed = 3, found = 0, hash = FNV_START;

	for (int at = 0; at < ITEMS; at++)
		items[at] = (struct item){ at + 1 < ITEMS ? &items[at + 1] : NULL, next_random(&seed), at };
	for (int key = 0; key < 20; key++)
		for (const struct item *item = list; item; item = item->next)
			if ((item->key & 0xff) == key) {
				found += item->index;
				break;
			}
	list = sort(list, by_key);
	for (const struct item *item = list; item; item = item->next)
		hash = fnv(hash, &item->key, sizeof item->key);
	list = sort(list, by_index);
	while (list) {
		struct item *next = list->next;

		list->next = reversed;
		reversed = list;
		list = next;
	}
	return hash ^ found ^ reversed->index;
}

/* All four in the order and about the shares of CoreMark. */
static uint64_t mixed_pass(void)
{
	uint64_t results[] = { list_pass(), matrix_pass(), state_pass(), list_pass() };

	return crc32(0, (const unsigned char *)results, sizeof results);
}

const struct bench integer_cases[] = {
	{ "integer", mixed_pass, 1 },
	{ "list-sort", list_pass, 1 },
	{ "matrix", matrix_pass, ORDER * ORDER * ORDER },
	{ "state-machine", state_pass, 100 * (sizeof words - 1) },
	{ "crc32", crc_pass, sizeof text },
	{ NULL, NULL, 0 },
};
