/* Floating point: five bodies that attract each other in scalar double, a Mandelbrot set in packed double, a polynomial on the x87. */
#include "bench.h"

#include <emmintrin.h>
#include <string.h>

#define BODIES 5
#define MOMENTS 500

struct body {
	double at[3], speed[3], mass;
};

static double root(double x)
{
	return _mm_cvtsd_f64(_mm_sqrt_sd(_mm_set_sd(x), _mm_set_sd(x)));
}

static void attract(struct body *a, struct body *b, double time)
{
	double way[3], square = 0, force;

	for (int axis = 0; axis < 3; axis++) {
		way[axis] = a->at[axis] - b->at[axis];
		square += way[axis] * way[axis];
	}
	force = time / (square * root(square));
	for (int axis = 0; axis < 3; axis++) {
		a->speed[axis] -= way[axis] * b->mass * force;
		b->speed[axis] += way[axis] * a->mass * force;
	}
}

static uint64_t scalar_pass(void)
{
	struct body bodies[BODIES];
	uint64_t seed = 8;

	for (int which = 0; which < BODIES; which++) {
		for (int axis = 0; axis < 3; axis++) {
			bodies[which].at[axis] = which * 7 + (double)(next_random(&seed) % 1000) / 1000;
			bodies[which].speed[axis] = (double)(next_random(&seed) % 1000) / 100000;
		}
		bodies[which].mass = 1.0 / (which + 1);
	}
	for (int moment = 0; moment < MOMENTS; moment++) {
		for (int one = 0; one < BODIES; one++)
			for (int other = one + 1; other < BODIES; other++)
				attract(&bodies[one], &bodies[other], 0.01);
		for (int which = 0; which < BODIES; which++)
			for (int axis = 0; axis < 3; axis++)
				bodies[which].at[axis] += 0.01 * bodies[which].speed[axis];
	}
	return fnv(FNV_START, bodies, sizeof bodies);
}

#define WIDTH 32
#define STEPS 50

/* Two points at a time. */
static uint64_t packed_pass(void)
{
	const __m128d two = _mm_set1_pd(2), four = _mm_set1_pd(4), one = _mm_set1_pd(1);
	double sums[2];
	__m128d total = _mm_setzero_pd();

	for (int row = 0; row < WIDTH; row++)
		for (int column = 0; column < WIDTH; column += 2) {
			__m128d x = _mm_set_pd(-2 + 2.5 * (column + 1) / WIDTH, -2 + 2.5 * column / WIDTH), y = _mm_set1_pd(-1 + 2.0 * row / WIDTH);
			__m128d real = x, imaginary = y, count = _mm_setzero_pd();

			for (int step = 0; step < STEPS; step++) {
				__m128d rr = _mm_mul_pd(real, real), ii = _mm_mul_pd(imaginary, imaginary);
				__m128d inside = _mm_cmple_pd(_mm_add_pd(rr, ii), four);

				count = _mm_add_pd(count, _mm_and_pd(inside, one));
				imaginary = _mm_add_pd(_mm_mul_pd(_mm_mul_pd(real, imaginary), two), y);
				real = _mm_add_pd(_mm_sub_pd(rr, ii), x);
				real = _mm_and_pd(real, inside);
				imaginary = _mm_and_pd(imaginary, inside);
			}
			total = _mm_add_pd(total, count);
		}
	_mm_storeu_pd(sums, total);
	return fnv(FNV_START, sums, sizeof sums);
}

#define TERMS 2000

static uint64_t x87_pass(void)
{
	long double x = 0.7L, sum = 0, power = 1;
	unsigned char bits[10];

	for (int term = 1; term <= TERMS; term++) {
		power *= x;
		sum += power / term;
		if (power < 1e-20L)
			power = 1 + sum / 1000;
	}
	memcpy(bits, &sum, sizeof bits);
	return fnv(FNV_START, bits, sizeof bits);
}

const struct bench float_cases[] = {
	{ "scalar-double", scalar_pass, MOMENTS },
	{ "packed-double", packed_pass, WIDTH * WIDTH / 2 * STEPS },
	{ "x87", x87_pass, TERMS },
	{ NULL, NULL, 0 },
};
