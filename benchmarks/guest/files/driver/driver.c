// SPDX-License-Identifier: Apache-2.0
/* What the guest compiles: a character device that keeps the last page written to it. It is never loaded. */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/uaccess.h>

static DEFINE_MUTEX(lock);
static char kept[PAGE_SIZE];
static size_t size;

static ssize_t keep_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	ssize_t done;

	mutex_lock(&lock);
	done = simple_read_from_buffer(to, count, at, kept, size);
	mutex_unlock(&lock);
	return done;
}

static ssize_t keep_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	ssize_t done;

	mutex_lock(&lock);
	done = simple_write_to_buffer(kept, sizeof(kept), at, from, count);
	if (done > 0)
		size = *at;
	mutex_unlock(&lock);
	return done;
}

static const struct file_operations operations = {
	.owner = THIS_MODULE,
	.read = keep_read,
	.write = keep_write,
};

static struct miscdevice device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "keep",
	.fops = &operations,
};

module_misc_device(device);
MODULE_DESCRIPTION("Keeps a page");
MODULE_LICENSE("Dual MIT/GPL");
