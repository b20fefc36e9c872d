/* What the kernel does for a program: a system call that does nothing, pages at first touch, a new process, a message to another and back. */
#define _GNU_SOURCE
#include "bench.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define CALLS 2000

static uint64_t call_pass(void)
{
	uint64_t equal = 0;
	long parent = syscall(SYS_getppid);

	for (int call = 1; call < CALLS; call++)
		equal += syscall(SYS_getppid) == parent;
	return equal;
}

#define PAGE 4096
#define PAGES 256

static uint64_t touch_pass(void)
{
	volatile unsigned char *area = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t sum = 0;

	if (area == MAP_FAILED)
		return 0;
	for (int page = 0; page < PAGES; page++)
		area[page * PAGE] = page;
	for (int page = 0; page < PAGES; page++)
		sum += area[page * PAGE];
	munmap((void *)area, PAGES * PAGE);
	return sum;
}

/* The child is this program, which leaves at once. */
static uint64_t execute_pass(void)
{
	char *arguments[] = { (char *)own_path, "child", NULL }, *nothing[] = { NULL };
	pid_t child = fork();
	int status = -1;

	if (child == 0) {
		execve(own_path, arguments, nothing);
		_exit(127);
	}
	waitpid(child, &status, 0);
	return status;
}

#define ROUND_TRIPS 500

static void echo(int from, int to)
{
	char byte;

	while (read(from, &byte, 1) == 1 && write(to, &byte, 1) == 1)
		;
	_exit(0);
}

static uint64_t pipe_pass(void)
{
	int there[2], back[2];
	uint64_t sum = 0;
	pid_t child;

	if (pipe(there) || pipe(back))
		return 0;
	child = fork();
	if (child == 0) {
		close(there[1]);
		close(back[0]);
		echo(there[0], back[1]);
	}
	close(there[0]);
	close(back[1]);
	for (int trip = 0; trip < ROUND_TRIPS; trip++) {
		unsigned char byte = trip;

		if (write(there[1], &byte, 1) == 1 && read(back[0], &byte, 1) == 1)
			sum += byte;
	}
	close(there[1]);
	close(back[0]);
	waitpid(child, NULL, 0);
	return sum;
}

const struct bench system_cases[] = {
	{ "getppid", call_pass, CALLS },
	{ "first-touch", touch_pass, PAGES },
	{ "fork-exec-wait", execute_pass, 1 },
	{ "pipe-round-trip", pipe_pass, ROUND_TRIPS },
	{ NULL, NULL, 0 },
};
