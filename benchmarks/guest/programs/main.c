/*
 * The program of `python -m benchmarks.guest`: process of a guest (or of the host) that runs one case at a time, as its input asks.
 *
 *   in   case NAME JOBS MILLISECONDS   passes of a case in JOBS processes at once, after one that is not timed
 *        shell COMMAND...              a command of the shell, once
 *        end                           leave
 *   out  @ready                        once, at the start
 *        @result OPERATIONS ALL NANOSECONDS CHECKSUM   ALL: with those that were not timed
 *        @failed REASON
 *
 * Time is CLOCK_MONOTONIC. Passes are repeated until the time is over, so that a case takes as long on any machine; what is compared is the
 * time of a pass. A pass whose checksum differs from the first one's is a failure.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define MOST_JOBS 8

struct outcome {
	uint64_t passes, nanoseconds, checksum;
	int is_sound;
};

static const struct bench *const groups[] = { integer_cases, call_cases, copy_cases, float_cases, system_cases };
const char *own_path;

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static const struct bench *find(const char *name)
{
	for (size_t group = 0; group < sizeof groups / sizeof *groups; group++)
		for (const struct bench *bench = groups[group]; bench->name; bench++)
			if (!strcmp(bench->name, name))
				return bench;
	return NULL;
}

static void repeat(const struct bench *bench, uint64_t duration, struct outcome *outcome)
{
	uint64_t begin, passes = 0;

	outcome->checksum = bench->pass();
	outcome->is_sound = 1;
	begin = now();
	do {
		if (bench->pass() != outcome->checksum)
			outcome->is_sound = 0;
		passes++;
		outcome->nanoseconds = now() - begin;
	} while (outcome->nanoseconds < duration);
	outcome->passes = passes;
}

/* Passes of all jobs, the time of the slowest. */
static void run_case(const char *name, int jobs, uint64_t duration, struct outcome *shared)
{
	const struct bench *bench = find(name);
	struct outcome sum = { .is_sound = 1 };

	if (!bench || jobs < 1 || jobs > MOST_JOBS) {
		printf("@failed there is no case %s for %d jobs\n", name, jobs);
		return;
	}
	memset(shared, 0, MOST_JOBS * sizeof *shared);
	for (int job = 1; job < jobs; job++) {
		if (fork() == 0) {
			repeat(bench, duration, &shared[job]);
			_exit(0);
		}
	}
	repeat(bench, duration, &shared[0]);
	while (wait(NULL) > 0 || errno == EINTR)
		;
	for (int job = 0; job < jobs; job++) {
		sum.passes += shared[job].passes;
		sum.is_sound &= shared[job].is_sound && shared[job].checksum == shared[0].checksum;
		if (shared[job].nanoseconds > sum.nanoseconds)
			sum.nanoseconds = shared[job].nanoseconds;
	}
	if (!sum.is_sound)
		printf("@failed two passes of %s differ\n", name);
	else
		printf("@result %llu %llu %llu %016llx\n", (unsigned long long)sum.passes * bench->operations,
		       (unsigned long long)(sum.passes + jobs) * bench->operations, (unsigned long long)sum.nanoseconds,
		       (unsigned long long)shared[0].checksum);
}

static void run_shell(const char *command)
{
	uint64_t begin = now(), checksum = FNV_START;
	FILE *output = popen(command, "r");
	char data[4096];
	size_t size;
	int status;

	if (!output) {
		printf("@failed no process: %s\n", strerror(errno));
		return;
	}
	while ((size = fread(data, 1, sizeof data, output)) > 0)
		checksum = fnv(checksum, data, size);
	status = pclose(output);
	if (status)
		printf("@failed status %#x of %s\n", status, command);
	else
		printf("@result 1 1 %llu %016llx\n", (unsigned long long)(now() - begin), (unsigned long long)checksum);
}

int main(int argc, char **argv)
{
	struct outcome *shared = mmap(NULL, MOST_JOBS * sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct termios terminal;
	char line[4096], name[64];
	unsigned milliseconds;
	int jobs;

	if (argc > 1) /* a child of the case that executes programs */
		return strcmp(argv[1], "child") != 0;
	own_path = argv[0];
	if (shared == MAP_FAILED)
		return 1;
	prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
	if (tcgetattr(STDIN_FILENO, &terminal) == 0) {
		terminal.c_lflag &= ~(ECHO | ECHOE | ECHOK | ECHONL);
		terminal.c_oflag &= ~ONLCR;
		tcsetattr(STDIN_FILENO, TCSANOW, &terminal);
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("\n@ready\n");
	while (fgets(line, sizeof line, stdin)) {
		line[strcspn(line, "\r\n")] = 0;
		if (sscanf(line, "case %63s %d %u", name, &jobs, &milliseconds) == 3)
			run_case(name, jobs, milliseconds * 1000000ull, shared);
		else if (!strncmp(line, "shell ", 6))
			run_shell(line + 6);
		else if (!strcmp(line, "end"))
			break;
		else
			printf("@failed no such request: %s\n", line);
	}
	return 0;
}
