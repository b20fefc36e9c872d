/* Copies within 64 KB: by bytes, words, SSE registers, repeated string instructions, and the C library. An operation is a byte. */
#include "bench.h"

#include <emmintrin.h>
#include <string.h>

#define SIZE 65536
#define SMALL 64
#define ROUNDS 16

static _Alignas(64) unsigned char from[SIZE], to[SIZE];

static void fill(void)
{
	uint64_t seed = 7;

	if (!from[0])
		for (size_t at = 0; at < SIZE; at++)
			from[at] = next_random(&seed) | 1;
}

/* What has arrived; the target is changed where it is looked at, so that a copy that did nothing is found. */
static uint64_t arrived(void)
{
	uint64_t hash = FNV_START;

	for (size_t at = 0; at < SIZE; at += SIZE / 64 - 1) {
		hash = fnv(hash, &to[at], 1);
		to[at] = 0;
	}
	return hash;
}

static uint64_t byte_pass(void)
{
	fill();
	for (int round = 0; round < ROUNDS; round++)
		for (size_t at = 0; at < SIZE; at++) {
			to[at] = from[at];
			KEEP_LOOP();
		}
	return arrived();
}

static uint64_t word_pass(void)
{
	fill();
	for (int round = 0; round < ROUNDS; round++)
		for (size_t at = 0; at < SIZE; at += sizeof(uint64_t)) {
			uint64_t word;

			memcpy(&word, from + at, sizeof word);
			memcpy(to + at, &word, sizeof word);
			KEEP_LOOP();
		}
	return arrived();
}

static uint64_t sse_pass(void)
{
	fill();
	for (int round = 0; round < ROUNDS; round++)
		for (size_t at = 0; at < SIZE; at += 64) {
			__m128i a = _mm_load_si128((const __m128i *)(from + at)), b = _mm_load_si128((const __m128i *)(from + at + 16));
			__m128i c = _mm_loadu_si128((const __m128i *)(from + at + 32)), d = _mm_loadu_si128((const __m128i *)(from + at + 48));

			_mm_store_si128((__m128i *)(to + at), a);
			_mm_store_si128((__m128i *)(to + at + 16), b);
			_mm_storeu_si128((__m128i *)(to + at + 32), c);
			_mm_storeu_si128((__m128i *)(to + at + 48), d);
			KEEP_LOOP();
		}
	return arrived();
}

static inline void rep_movsb(void *target, const void *source, size_t size)
{
	__asm__ volatile("rep movsb" : "+D"(target), "+S"(source), "+c"(size) : : "memory");
}

static uint64_t rep_small_pass(void)
{
	fill();
	for (size_t at = 0; at < SIZE; at += SMALL)
		rep_movsb(to + at, from + at, SMALL);
	return arrived();
}

static uint64_t rep_large_pass(void)
{
	fill();
	for (int round = 0; round < ROUNDS; round++)
		rep_movsb(to, from, SIZE);
	return arrived();
}

static uint64_t rep_stosb_pass(void)
{
	for (int round = 0; round < ROUNDS; round++) {
		void *target = to;
		size_t count = SIZE;

		__asm__ volatile("rep stosb" : "+D"(target), "+c"(count) : "a"(0x5a) : "memory");
	}
	return arrived();
}

static uint64_t rep_stosq_pass(void)
{
	for (int round = 0; round < ROUNDS; round++) {
		void *target = to;
		size_t count = SIZE / sizeof(uint64_t);

		__asm__ volatile("rep stosq" : "+D"(target), "+c"(count) : "a"(0x0102030405060708u) : "memory");
	}
	return arrived();
}

static uint64_t library_pass(void)
{
	fill();
	for (int round = 0; round < ROUNDS; round++) {
		memcpy(to, from, SIZE);
		KEEP_LOOP();
	}
	return arrived();
}

const struct bench copy_cases[] = {
	{ "byte-copy", byte_pass, SIZE * ROUNDS },
	{ "word-copy", word_pass, SIZE * ROUNDS },
	{ "sse-copy", sse_pass, SIZE * ROUNDS },
	{ "rep-movsb-64", rep_small_pass, SIZE },
	{ "rep-movsb-64k", rep_large_pass, SIZE * ROUNDS },
	{ "rep-stosb-64k", rep_stosb_pass, SIZE * ROUNDS },
	{ "rep-stosq-64k", rep_stosq_pass, SIZE * ROUNDS },
	{ "memcpy-64k", library_pass, SIZE * ROUNDS },
	{ NULL, NULL, 0 },
};
