// The program of the series' cover letter: main calls random, foo and bar, and these two call qux, which branches by its argument.
#include <stdlib.h>

volatile unsigned sink;

__attribute__((noinline)) void qux(unsigned v)
{
	if (v & 1)
		sink += 3;
	if (v & 2)
		sink ^= v;
}

__attribute__((noinline)) void foo(unsigned v)
{
	qux(v);
	sink++;
}

__attribute__((noinline)) void bar(unsigned v)
{
	qux(v >> 2);
	sink--;
}

int main(void)
{
	for (long n = 300000; n > 0; n--) {
		unsigned r = random();
		foo(r);
		bar(r);
	}
	return 0;
}
